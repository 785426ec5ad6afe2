# Which SIMD levels this compiler and architecture can build, and with which flags. The level that runs is chosen by CPUID.
set(MEMDEC_SIMD_LEVELS portable)
set(MEMDEC_SIMD_FLAGS_portable "")
set(MEMDEC_SIMD_FLAGS_avx2 -mavx2 -mbmi -mbmi2 -mfma -mf16c)
set(MEMDEC_SIMD_FLAGS_avx512 -mavx2 -mbmi -mbmi2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)

# The build for the tests of the CUDA kernels on the CPU uses the CPU's own kernels for float64 only.
if(NOT MEMDEC_CUDA STREQUAL "host" AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  include(CheckCXXCompilerFlag)
  foreach(level avx2 avx512)
    string(REPLACE ";" " " flags "${MEMDEC_SIMD_FLAGS_${level}}")
    check_cxx_compiler_flag("${flags}" MEMDEC_COMPILER_HAS_${level})
    if(MEMDEC_COMPILER_HAS_${level})
      list(APPEND MEMDEC_SIMD_LEVELS ${level})
    endif()
  endforeach()
endif()
