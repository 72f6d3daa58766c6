"""Figures for the command line. The modules import matplotlib, the package does not."""
