from .._bus cimport CDevice
from ._uart cimport uart

cdef class Serial(CDevice):
    cdef uart u
