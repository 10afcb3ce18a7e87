"""What makes the documentation out of the code and tries its examples; no part of the product."""
