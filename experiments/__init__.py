"""What BuPO does and does not do, with seeds, controls and intervals: `python -m experiments.sweep
--list`."""
