"""A corpus that every machine has: the source of the Python standard library, and questions that its docstrings answer.

    python data/python_docs.py --out out/python_docs

writes corpus.jsonl, one document per line: {"text": ..., "source": "json/decoder.py"}, and qa_train.jsonl, qa_dev.jsonl and
qa_test.jsonl, one question per line, about 85, 5 and 10 % of the modules. Example: the docstring of dedent in textwrap.py is
"Remove any common leading whitespace from every line in `text`. This can be used to ...", which becomes the question

    {"question": "What does the function textwrap.dedent do?", "kind": "function", "source": "textwrap.py",
     "answer": "Remove any common leading whitespace from every line in `text`."}

The corpus holds the modules of all three splits: a model has read the answers in pretraining, only the questions are new.
No module is imported, files are only read, so that the same Python and --seed give the same bytes.
"""

import ast
import os
import re
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from papagaio.corpus.split import split_of
from papagaio.errors import MachineError, UserError, run
from papagaio.files import write_rows
from papagaio.options import Options, option, parse

# Tests, installed packages, and files that describe the machine on which this Python was built.
SKIPPED = re.compile(r"tests?|idle_test|(site|dist)-packages|__pycache__|config-.*|_sysconfigdata.*")
CHARACTER_TABLE = re.compile(r"^decoding_(table|map) *=", re.MULTILINE)  # most of encodings/ is tables of numbers
TOPICS = "pydoc_data/topics.py"  # the language reference of help(), a dict of texts

QUESTIONS = {
    "module": "What is the module {} for?",
    "class": "What is the class {}?",
    "function": "What does the function {} do?",
    "method": "What does the method {} do?",
}
SENTENCE_END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`'\"(])")
# Begins with a capital, ends with a full stop, and is neither a signature, "dedent(text)", nor a reference to another docstring.
ANSWER = re.compile(r"(?![\w.]+\(|(See|Same as|Like|Similar to|Overrid\w+|TODO|Deprecated|Internal)\b)[A-Z].*[.!]")
MOST_REPEATS = 3  # an answer of more questions than this ("Close the connection.") says little about any of them


class PythonDocsOptions(Options):
    """Options of data/python_docs.py."""

    out: Path = option(..., "directory of the four files, which are replaced")
    seed: int = option(1337, "seed of the split of the modules into train, dev and test", ge=0)


def main(config: PythonDocsOptions) -> None:
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"--out={config.out}: a file; a directory is needed")
    library = Path(sysconfig.get_path("stdlib"))
    documents, questions, unreadable = [], [], 0
    for source in python_files(library):
        try:
            with tokenize.open(library / source) as file:  # obeys the file's `# -*- coding -*-` line
                text = file.read()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError):
            unreadable += 1
            continue
        if source == TOPICS:
            text = "\n\n".join(ast.literal_eval(tree.body[-1].value).values())
        if not CHARACTER_TABLE.search(text):
            documents.append({"text": text, "source": source})
            questions += ask(tree, source)
    if not documents:
        raise MachineError(f"{library} has no Python source: this Python was installed without its standard library's files")

    config.out.mkdir(parents=True, exist_ok=True)
    write_rows(config.out / "corpus.jsonl", documents)
    size = sum(len(document["text"].encode()) for document in documents)
    print(f"corpus: {len(documents):,} documents, {size / 1e6:.1f} MB; unreadable files: {unreadable}", file=sys.stderr)
    questions = distinct(questions)
    for split in ("train", "dev", "test"):
        # One docstring may help with the question about another of the module.
        chosen = [question for question in questions if split_of(module_name(question["source"]), config.seed) == split]
        write_rows(config.out / f"qa_{split}.jsonl", chosen)
        counts = ", ".join(f"{n:,} {kind}" for kind, n in sorted(Counter(question["kind"] for question in chosen).items()))
        print(f"qa_{split}: {len(chosen):,} questions: {counts}", file=sys.stderr)


def python_files(library: Path) -> Iterator[str]:
    """Paths relative to `library`, with forward slashes, in an order that does not depend on the file system."""
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = sorted(name for name in subfolders if not SKIPPED.fullmatch(name))  # os.walk enters those that are left
        for name in sorted(files):
            if name.endswith(".py") and not SKIPPED.fullmatch(name):
                yield (Path(folder) / name).relative_to(library).as_posix()


def ask(tree: ast.Module, source: str) -> Iterator[dict[str, str]]:
    """The questions of one file, from the docstrings of its public names."""
    module = module_name(source)
    if re.search(r"(^|\.)_", module):
        return
    for kind, name, node in definitions("module", module, tree):
        answer = first_sentence(ast.get_docstring(node) or "", name)
        if is_answer(answer, name):
            yield {"question": QUESTIONS[kind].format(name), "kind": kind, "source": source, "answer": answer}


def module_name(source: str) -> str:
    """json/decoder.py -> json.decoder, json/__init__.py -> json."""
    return source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def definitions(kind: str, name: str, node: ast.AST) -> Iterator[tuple[str, str, ast.AST]]:
    """(kind, dotted name, node) of a module and of all public classes, functions and methods in it."""
    yield kind, name, node
    if kind not in ("module", "class"):
        return  # a definition inside a function has no public name
    function = "method" if kind == "class" else "function"
    kinds = {ast.ClassDef: "class", ast.FunctionDef: function, ast.AsyncFunctionDef: function}
    for child in node.body:
        if type(child) not in kinds or child.name.startswith("_"):
            continue
        if not any("property" in ast.unparse(decorator) for decorator in child.decorator_list):  # a property "does" nothing
            yield from definitions(kinds[type(child)], f"{name}.{child.name}", child)


def first_sentence(docstring: str, name: str) -> str:
    r"""`dedent -- Remove blanks\nfrom lines. Then ...` -> `Remove blanks from lines.`"""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    paragraph = re.sub(rf"^(Module )?(\w+\.)*{name.rpartition('.')[2]}(\.py|\(.*?\))?( -+|:) ", "", paragraph)
    sentence = SENTENCE_END.split(paragraph)[0]
    return sentence if sentence.endswith((".", "!", "?", ":", ",")) else sentence + "."


def is_answer(sentence: str, name: str) -> bool:
    """Whether it is readable text that says more than the name in the question."""
    news = {word for word in words(sentence) if len(word) > 3} - set(words(name))
    return 15 <= len(sentence) <= 200 and ANSWER.fullmatch(sentence) is not None and sentence.isprintable() and len(news) >= 2


def words(text: str) -> list[str]:
    """`HTTPServer.get_request` -> http, server, get, request."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", text)]


def distinct(questions: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each question once (the first definition), without those whose answer too many questions share."""
    first = {question["question"]: question for question in reversed(questions)}
    repeats = Counter(question["answer"] for question in first.values())
    return [question for question in reversed(first.values()) if repeats[question["answer"]] <= MOST_REPEATS]


if __name__ == "__main__":
    run(main, parse(PythonDocsOptions, doc=__doc__))
