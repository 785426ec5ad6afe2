# Warnings are part of the code's review; they are not errors, so that a newer compiler cannot break an installation.
function(memdec_warnings target)
  target_compile_options(${target} PRIVATE -Wall -Wextra -Wconversion -Wno-sign-conversion -Wshadow)
endfunction()

# GCC's own AVX-512 intrinsics start from undefined registers, and GCC then warns of it.
function(memdec_intrinsics_warnings target)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${target} PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized)
  endif()
endfunction()
