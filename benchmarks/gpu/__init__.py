"""What only a GPU can show, in one run: suite.sh."""
