"""From a fit to operating points, curves and optima."""
