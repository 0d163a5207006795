"""Tensor functions that several families share; torch only."""
