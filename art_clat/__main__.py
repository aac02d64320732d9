"""`python -m art_clat`, the same as `art-clat`."""

from art_clat.cli import main

if __name__ == "__main__":
    main()
