"""`python -m ndtrain`: the entry that torchrun starts on every rank."""

from ndtrain.cli import main

if __name__ == "__main__":
    main()
