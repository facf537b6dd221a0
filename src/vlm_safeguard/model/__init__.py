"""The model as a guard sees it: its language model, its prompts, its states."""
