"""What is measured on the models themselves: the gap, divergence, perplexity."""
