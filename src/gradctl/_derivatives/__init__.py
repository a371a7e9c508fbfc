"""Products with Hessian, Gauss-Newton and Jacobian; per-sample gradients; what is built on them."""
