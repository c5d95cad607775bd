"""Figures and tables of arXiv:2007.08554."""
