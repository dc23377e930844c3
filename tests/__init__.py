"""Tests of Bise."""
