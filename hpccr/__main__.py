"""`python -m hpccr`: the same as the hpccr command."""

from hpccr.cli.main import entry

if __name__ == "__main__":
    raise SystemExit(entry())
