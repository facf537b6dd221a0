"""The recipe that trained the Pocket VLM, one file for each step."""
