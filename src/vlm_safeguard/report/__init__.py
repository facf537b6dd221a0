"""Showing results: tables for the terminal, figures for everything else."""
