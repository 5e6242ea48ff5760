"""``difflayers.compat.cvxpylayers.torch`` stands for ``cvxpylayers.torch`` 1.2.0."""
