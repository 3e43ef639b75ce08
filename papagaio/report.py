"""What is left out, dropped or passed over: counted by reason, with its first places, and named once."""

from pathlib import Path

PLACES_SHOWN = 5


class Report:
    """Counts by reason: `dropped, empty answer: 7 (qa.jsonl:4, qa.jsonl:9, qa.jsonl:12, qa.jsonl:15, qa.jsonl:17, ...)`."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.places: dict[str, list[str]] = {}  # the first few of each reason

    def note(self, reason: str, place: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES_SHOWN:
            places.append(place)

    def merge(self, other: "Report", prefix: str = "") -> None:
        """Add another report, of a later part of the input; `prefix` goes before its reasons."""
        for reason, count in other.counts.items():
            here = prefix + reason
            self.counts[here] = self.counts.get(here, 0) + count
            self.places[here] = [*self.places.get(here, []), *other.places[reason]][:PLACES_SHOWN]

    def lines(self) -> list[str]:
        """One line per reason."""
        return [
            f"{reason}: {count:,} ({', '.join(self.places[reason])}{', ...' if count > len(self.places[reason]) else ''})"
            for reason, count in self.counts.items()
        ]

    def first(self, path: Path) -> str:
        """The first place in a file where something was left out, with the reason; else the path. For the error that nothing of
        the file is left."""
        found = (
            f"{p}: {reason.removeprefix('dropped, ')}"
            for reason, places in self.places.items()
            for p in places
            if p.startswith(f"{path}:") and not reason.startswith("not read")
        )
        return next(found, str(path))
