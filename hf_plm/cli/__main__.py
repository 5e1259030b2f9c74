"""`python -m hf_plm.cli`, which is what launchers start."""

from hf_plm.cli import main

if __name__ == "__main__":
    main()
