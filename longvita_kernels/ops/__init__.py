"""One module per op. Read each from top to bottom: equation and shapes, reference, public function, flat ops, autograd, spec."""
