"""What others made is data: settings, paths, sizes, Zarr and HDF5 that name nothing outside of themselves."""
