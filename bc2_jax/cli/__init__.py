"""The command-line programs: one module each, whose `main(argv)` returns the exit code; `programs.py` lists them."""
