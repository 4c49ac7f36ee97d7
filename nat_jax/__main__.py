"""``python -m nat_jax`` is ``python -m nat_jax.main``."""

from nat_jax.main import run

if __name__ == "__main__":
    run()
