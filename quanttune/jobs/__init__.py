"""What the verbs of the command line do, a file per verb, and what these share."""
