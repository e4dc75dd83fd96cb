"""Small-matrix engine: linear SDEs made discrete, filtered, smoothed and sampled.

Layers, each using those before it: `small` (operations on matrices of a few rows),
`discretize` (exact transitions of a linear SDE), `recursions` (the forward and backward
recursions and the exact score), `kalman` (filter and likelihood of a model given by arrays),
`smoothing` (moments and draws given all data); and `affine` (is a function affine?).
"""
