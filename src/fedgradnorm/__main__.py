"""``python -m fedgradnorm``: the command line."""

from fedgradnorm.cli import main

if __name__ == "__main__":
    main()
