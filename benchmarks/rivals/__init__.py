"""Other libraries on the rows of the MiniLM demo."""
