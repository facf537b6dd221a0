"""What is asked: samples, their files, image conditions and benchmarks."""
