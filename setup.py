"""Packages of the distribution; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

# The configs live at the top of the checkout, where a person looks for them, and travel in the
# wheel as nat_jax/configs.
setup(
    packages=[
        *find_packages(include=["nat_jax", "nat_jax.*"]),
        "nat_jax.configs",
        "nat_jax.configs.modern",
        "nat_jax.configs.paper",
    ],
    package_dir={
        "nat_jax.configs": "configs",
        "nat_jax.configs.modern": "configs/modern",
        "nat_jax.configs.paper": "configs/paper",
    },
    package_data={"": ["py.typed", "*.html", "*.css"]},
)
