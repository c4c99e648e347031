"""Executed notebooks become one HTML page and one PDF. Takes nothing of the other folders."""
