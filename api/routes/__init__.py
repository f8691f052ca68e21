"""The routes, one module a resource; they translate and do not decide."""
