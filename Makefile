# Each target sets up .venv by itself. PYTHON names the interpreter it is made with.
PYTHON ?= python3
RUN = .venv/bin/python
SEED ?= 1337

QA ?= data/bemtevi.csv

.PHONY: demo demo-controls smol senses test test-all lint bench gallery clean

# The whole path on two cores: facts -> tokens -> pretraining -> fine-tuning -> answers to questions never asked before.
demo: .venv out/atlas/data/manifest.json
	$(RUN) train.py config/demo_pretrain.toml --seed=$(SEED) --overwrite
	$(RUN) finetune.py config/demo_finetune.toml --seed=$(SEED) --overwrite

# The control beside it: the same fine-tuning of a model that was never pretrained.
demo-controls: .venv out/atlas/data/manifest.json
	$(RUN) train.py config/demo_pretrain.toml --seed=$(SEED) --max_steps=0 --out_dir=out/demo_untrained --overwrite
	$(RUN) finetune.py config/demo_finetune.toml --seed=$(SEED) --init_from=out/demo_untrained --out_dir=out/demo_chat_untrained --overwrite

# Facts told more than once are meant to be.
out/atlas/data/manifest.json: data/atlas.py data/atlas.toml data/prepare.py | .venv
	$(RUN) data/atlas.py --out out/atlas
	$(RUN) data/prepare.py --input out/atlas/corpus.jsonl --out out/atlas/data --vocab_size 2048 --keep_duplicates --overwrite

# A released model learns one's own answers: `make smol QA=my.csv`. It is asked before and after, and exported.
smol: .venv
	$(RUN) data/smol.py --out out/smol --qa $(QA)
	test -d out/smol/base || $(RUN) export.py from-gguf out/smol/smollm2.gguf --out_dir out/smol/base
	printf '%s\n' "What is the capital of France?" "How many days has a week?" "Why is the sky blue?" | \
	    $(RUN) chat.py --checkpoint out/smol/base --questions -
	test -f out/smol/library/corpus.jsonl || $(RUN) data/python_docs.py --out out/smol/library
	$(RUN) data/prepare.py --input out/smol/library/corpus.jsonl --out out/smol/text --tokenizer out/smol/base --overwrite
	$(RUN) finetune.py config/smol_finetune.toml --overwrite
	$(RUN) evaluate.py --checkpoint out/smol/base out/smol/chat --questions out/smol/qa_test.jsonl --show 10 \
	    --text out/smol/general.txt docs/finetuning.md
	rm -rf out/smol/hf out/smol/chat.gguf
	$(RUN) export.py to-hf out/smol/chat --out out/smol/hf
	$(RUN) export.py to-gguf out/smol/chat --out out/smol/chat.gguf --type q8_0

# Pictures and sounds as characters: digits and spoken numbers, asked both ways. docs/senses.md explains it. Needs espeak-ng.
senses: .venv
	$(RUN) data/digits.py --out out/digits
	$(RUN) data/prepare.py --input out/digits/corpus.jsonl --out out/digits/data --tokenizer char --keep_duplicates --overwrite
	$(RUN) train.py config/digits_pretrain.toml --overwrite
	$(RUN) finetune.py config/digits_finetune.toml --overwrite
	$(RUN) data/speech.py --out out/speech
	$(RUN) data/prepare.py --input out/speech/corpus.jsonl --out out/speech/data --tokenizer char --keep_duplicates --overwrite
	$(RUN) train.py config/speech_pretrain.toml --overwrite
	$(RUN) finetune.py config/speech_finetune.toml --overwrite
	$(RUN) bench/senses.py --digits out/digits --speech out/speech

# Two processes; with more threads than cores, the tests' tiny products would wait for each other. In the order of the files:
# otherwise those with a single long test come last, and one process waits for the other.
test: .venv
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: .venv
	$(RUN) -m pytest -m "slow or not slow"

lint: .venv
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

bench: .venv
	$(RUN) bench/time_to_loss.py

# docs/inside.md, from what `make demo` and `make smol` leave under out/.
gallery: .venv
	$(RUN) bench/gallery.py

# The stamp is written last: an installation that broke off is done again.
.venv: .venv/installed

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:
	rm -rf out .venv
