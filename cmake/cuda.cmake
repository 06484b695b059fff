# The extension _cuda: kernels for every requested compute capability, and PTX of the newest for cards to come. Static CUDA run
# time and no libtorch: one build serves every torch version and needs only the driver.
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

set(archs ${DELTAIC_CUDA_ARCHS})
if(NOT archs)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known RESULT_VARIABLE failed)
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  # One per generation: code for x.0 runs on x.y, and these are the cards that people have.
  foreach(arch 75 80 86 89 90 100 120)
    if(arch IN_LIST known)
      list(APPEND archs ${arch})
    endif()
  endforeach()
  if(failed OR NOT archs)
    message(FATAL_ERROR "${CMAKE_CUDA_COMPILER} --list-gpu-arch names no compute capability; set DELTAIC_CUDA_ARCHS")
  endif()
endif()
list(POP_BACK archs newest)
set(cuda_architectures "")
foreach(arch ${archs})
  list(APPEND cuda_architectures ${arch}-real)
endforeach()
list(APPEND cuda_architectures ${newest})  # code and PTX
set(CMAKE_CUDA_ARCHITECTURES ${cuda_architectures})
enable_language(CUDA)

set(names "")
foreach(arch ${archs} ${newest})
  list(APPEND names sm_${arch})
endforeach()
list(JOIN names " " names)
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
pybind11_add_module(_cuda NO_EXTRAS csrc/bindings/cuda_module.cpp csrc/core/error.cpp ${cuda_sources})
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
target_include_directories(_cuda PRIVATE csrc)
target_compile_definitions(_cuda PRIVATE "DELTAIC_CUDA_ARCHITECTURES=\"${names} and PTX\"")
target_compile_options(_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:--extended-lambda -Werror=all-warnings -Xcompiler=-Wall,-Wextra>)
install(TARGETS _cuda LIBRARY DESTINATION deltaic)
