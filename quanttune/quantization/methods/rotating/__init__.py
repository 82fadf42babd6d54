"""What is found and folded where the channels of a model are rotated."""
