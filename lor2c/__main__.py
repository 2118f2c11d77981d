"""`python -m lor2c` is the command `lor2c`: `torchrun -m lor2c glue ...` starts several processes."""

from lor2c.cli.main import main

if __name__ == "__main__":
    main()
