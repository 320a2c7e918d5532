"""The release version; it ties the package, the book and the Colab install together."""

__version__ = "0.2.0"
