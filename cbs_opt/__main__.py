"""`python -m cbs_opt` is `cbs-opt`."""

from cbs_opt.cli import main

if __name__ == "__main__":
    main()
