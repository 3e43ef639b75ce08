"""The machinery under papagaio's scripts, a subject a file. Never imports a script, model.py, data/ or config/."""
