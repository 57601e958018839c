"""Support code shared by the tests; nothing here is part of the package."""
