# The CUDA backend: whether it is built, for which architectures, and how.
#
#   MEMDEC_CUDA=auto                 built where nvcc 12 or later is found
#   MEMDEC_CUDA=on | off             an error where it is not found | never built
#   MEMDEC_CUDA=host                 for the tests only: the kernels compiled as C++, under sanitizers, to run on the CPU
#   MEMDEC_CUDA_ARCHITECTURES=90     instead of the list below; `native` is the machine's own GPU
set(MEMDEC_CUDA auto CACHE STRING "CUDA kernels: auto (where nvcc is found), on or off")
set_property(CACHE MEMDEC_CUDA PROPERTY STRINGS auto on off)
set(MEMDEC_CUDA_ARCHITECTURES "" CACHE STRING "CUDA architectures, such as 90 or 80;90, or native; empty: all that memdec is made for")

set(MEMDEC_CUDA_BACKEND ${MEMDEC_CUDA})
if(MEMDEC_CUDA STREQUAL "auto")
  include(CheckLanguage)
  check_language(CUDA)
  set(MEMDEC_CUDA_BACKEND off)
  if(CMAKE_CUDA_COMPILER)
    set(MEMDEC_CUDA_BACKEND on)
  endif()
elseif(NOT MEMDEC_CUDA MATCHES "^(on|off|host)$")
  message(FATAL_ERROR "MEMDEC_CUDA is '${MEMDEC_CUDA}', wanted auto, on or off.")
endif()

if(MEMDEC_CUDA_BACKEND STREQUAL "on")
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # given to the compiler below, so that the compiler's version is known first
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
    if(MEMDEC_CUDA STREQUAL "on")
      message(FATAL_ERROR "MEMDEC_CUDA=on: nvcc is ${CMAKE_CUDA_COMPILER_VERSION}, wanted 12.0 or later, for C++20.")
    endif()
    set(MEMDEC_CUDA_BACKEND off)
  endif()
endif()

if(MEMDEC_CUDA_BACKEND STREQUAL "on")
  find_package(CUDAToolkit REQUIRED)
  set(arches ${MEMDEC_CUDA_ARCHITECTURES})
  if(NOT arches)
    set(arches 80 86 89 90)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
      list(APPEND arches 100 120)
    endif()
  endif()
  # Machine code for each, and PTX for the newest only, from which later GPUs compile their own.
  set(MEMDEC_CUDA_CODE ${arches})
  if(arches MATCHES "^[0-9;]+$")
    list(TRANSFORM MEMDEC_CUDA_CODE APPEND "-real")
    list(GET arches -1 newest)
    list(APPEND MEMDEC_CUDA_CODE "${newest}-virtual")
  endif()
  message(STATUS "CUDA kernels: on (nvcc ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${MEMDEC_CUDA_CODE})")
elseif(MEMDEC_CUDA_BACKEND STREQUAL "host")
  set(MEMDEC_CUDA_CODE "")
  message(STATUS "CUDA kernels: run on the CPU, for the tests only")
else()
  message(STATUS "CUDA kernels: off (MEMDEC_CUDA=${MEMDEC_CUDA}; nvcc 12 or later on the PATH, or in CUDACXX, is what auto looks for)")
endif()

# Adds the ops' kernels to the extension, if they are to be built.
function(memdec_add_cuda extension)
  if(MEMDEC_CUDA_BACKEND STREQUAL "off")
    return()
  endif()
  add_library(memdec_cuda OBJECT ${ARGN})
  target_include_directories(memdec_cuda PRIVATE csrc)
  if(MEMDEC_CUDA_BACKEND STREQUAL "on")
    set_target_properties(memdec_cuda PROPERTIES
      CUDA_ARCHITECTURES "${MEMDEC_CUDA_CODE}" CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden
      CUDA_RUNTIME_LIBRARY Static)
    # -v is what tests/cuda/check_kernels.py reads the registers and spills of each kernel from.
    target_compile_options(memdec_cuda PRIVATE
      -Xcompiler=-Wall,-Wextra,-Wshadow -Wreorder --Werror=cross-execution-space-call --expt-relaxed-constexpr -Xptxas=-v)
    target_link_libraries(${extension} PRIVATE CUDA::cudart_static)
    set(nvcc ${CMAKE_CUDA_COMPILER_VERSION})
  else()
    set_source_files_properties(${ARGN} PROPERTIES LANGUAGE CXX)
    target_sources(memdec_cuda PRIVATE tests/cuda/host/executor.cpp)
    set_source_files_properties(tests/cuda/host/executor.cpp PROPERTIES COMPILE_OPTIONS "-O2;-fno-sanitize=all")
    target_include_directories(memdec_cuda BEFORE PRIVATE tests/cuda/host)
    target_compile_options(memdec_cuda PRIVATE
      -O1 -g -fno-strict-aliasing -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined -Wno-unknown-pragmas)
    memdec_warnings(memdec_cuda)
    target_link_options(${extension} PRIVATE -fsanitize=address,undefined)
    set(nvcc "")
  endif()
  list(JOIN MEMDEC_CUDA_CODE " " code)
  target_sources(${extension} PRIVATE $<TARGET_OBJECTS:memdec_cuda>)
  target_compile_definitions(${extension} PRIVATE
    MEMDEC_HAS_CUDA=1 MEMDEC_CUDA="${MEMDEC_CUDA_BACKEND}" MEMDEC_CUDA_ARCHES="${code}" MEMDEC_NVCC="${nvcc}")
endfunction()
