// The routes through C++: a foreign thread, an explicit guard, the engine itself, a C++ Function.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <thread>

namespace {

using at::Tensor;

Tensor thread_forward(const Tensor& w) {
  Tensor out;
  std::thread([&] { out = (w * 2).sum(); }).join();
  return out;
}

std::string thread_backward(const Tensor& w) {
  std::string error;
  std::thread([&] {
    try {
      torch::autograd::backward({(w * 2).sum()}, {});
    } catch (const std::exception& raised) {
      error = raised.what();
    }
  }).join();
  return error;
}

void run_backward(const Tensor& y) { torch::autograd::backward({y}, {}); }

Tensor guarded(const Tensor& w) {
  at::AutoGradMode on(true);
  return (w * 2).sum();
}

struct Twice : torch::autograd::Function<Twice> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& w) {
    ctx->save_for_backward({w});
    return w * 2;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*, torch::autograd::variable_list g) {
    return {g[0] * 2};
  }
};

Tensor function(const Tensor& w) {
  at::AutoGradMode on(true);
  return Twice::apply(w).sum();
}

}  // namespace

TORCH_LIBRARY(gradctl_routes_native, m) {
  m.def("thread_forward(Tensor w) -> Tensor", &thread_forward);
  m.def("thread_backward(Tensor w) -> str", &thread_backward);
  m.def("run_backward(Tensor y) -> ()", &run_backward);
  m.def("guarded(Tensor w) -> Tensor", &guarded);
  m.def("function(Tensor w) -> Tensor", &function);
}
