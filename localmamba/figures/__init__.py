"""Figures for the command line. Matplotlib is imported by the modules, not by the package."""
