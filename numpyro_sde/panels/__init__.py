"""Many series: a fit for each on any executor, and one model of all over many devices."""
