"""Experiments: settings x seeds as runs of train.py, their table, and the pages made of them."""
