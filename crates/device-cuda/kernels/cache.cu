#include "baton.cuh"
