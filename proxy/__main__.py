"""`python -m proxy` is the `chatfold` command."""

from proxy.cli import main

if __name__ == "__main__":
    main()
