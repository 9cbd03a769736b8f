"""Commands for users and maintainers: plots, pictures, conversion, benchmarks and fault tests."""
