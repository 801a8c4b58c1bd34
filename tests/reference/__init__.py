"""One naive reference a method: loops over rows and tokens in float64, for the tests and the benchmarks.

A reference lives in the file named like that of its compressor and has one function,
`survivors(view, keep, *, seed=0)`: for each row, the numbers of the tokens that are kept, counted within the row.
"""
