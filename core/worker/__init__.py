"""The side that imports torch. The page process imports of it only `process`."""
