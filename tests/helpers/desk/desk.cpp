// A toy accelerator, the device "desk" of torch with the indices 0 and 1: kernels of the CPU on memory of its own.
//
// It is as strict as a GPU: tensors of two devices in one call are refused, and what would make the host wait for the
// device is counted, or refused if desk_forbid_syncs(1) was called. Random numbers are those of one generator for each
// index, and dropout draws other numbers than bernoulli_ does, as the fused kernel of CUDA.
//
// A tensor of the device has a storage of its own whose memory a tensor of the CPU can share, so a kernel is called in
// three steps: `to_host` makes CPU tensors of the same bytes, the CPU's kernel runs, `to_desk` takes back its results.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

constexpr auto DESK = c10::DeviceType::PrivateUse1;
constexpr int COUNT = 2;

// Autograd has a thread for each device, with a current device of its own.
std::atomic<int64_t> syncs = 0, launches = 0;
std::atomic<bool> forbids_syncs = false, is_available = false;
thread_local int current = 0;
thread_local int depth = 0;  // of kernels: what the CPU's kernels call themselves is not counted
std::mutex drawing;

struct Inside {
  Inside() { depth++; }
  ~Inside() { depth--; }
};

void count_launch() { launches += depth == 0; }

void count_sync(const std::string& cause) {
  if (depth) return;
  syncs++;
  TORCH_CHECK(!forbids_syncs, "called a synchronizing operation: ", cause);
}

// Memory, devices and generators

struct DeskAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* memory = nullptr;
    TORCH_CHECK(!bytes || !posix_memalign(&memory, 64, bytes), "desk is out of memory");
    return {memory, memory, &std::free, c10::Device(DESK, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }
};
DeskAllocator allocator;
REGISTER_ALLOCATOR(DESK, &allocator);

struct DeskGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return DESK; }
  c10::Device getDevice() const override { return c10::Device(DESK, current); }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Stream getStream(c10::Device device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, DeskGuard);

struct OnDevice {
  int before = current;
  explicit OnDevice(int index) { if (index >= 0) current = index; }
  ~OnDevice() { current = before; }
};

at::Generator& generator_of(int index) {
  static std::vector<at::Generator> all{at::detail::createCPUGenerator(1234), at::detail::createCPUGenerator(1235)};
  return all[index < 0 ? current : index];
}

void resize_memory(const c10::Storage& storage, size_t bytes) {
  auto* impl = storage.unsafeGetStorageImpl();
  OnDevice guard(impl->device().index());
  auto fresh = allocator.allocate(bytes);
  if (auto kept = std::min(bytes, impl->nbytes())) std::memcpy(fresh.get(), impl->data(), kept);
  impl->set_data_ptr(std::move(fresh));
  impl->set_nbytes(bytes);
}

struct DeskHooks final : at::PrivateUse1HooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return is_available; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return is_available ? COUNT : 0; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return generator_of(index); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_memory(storage, bytes);
  }
};
const bool has_hooks = [] {
  at::RegisterPrivateUse1HooksInterface(new DeskHooks());
  return true;
}();

// Tensors of the same bytes on the other device

bool is_desk(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == DESK; }

c10::Storage sharing(const c10::Storage& storage, c10::Device device, c10::Allocator* owner) {
  auto keep = [](void* held) { delete static_cast<c10::Storage*>(held); };
  c10::DataPtr memory(const_cast<void*>(storage.data()), new c10::Storage(storage), keep, device);
  auto by_size = c10::StorageImpl::use_byte_size_t();
  return c10::Storage(c10::make_intrusive<c10::StorageImpl>(by_size, storage.nbytes(), std::move(memory), owner, true));
}

at::Tensor in_storage(const at::Tensor& like, c10::Storage storage, c10::DispatchKey key) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_storage_offset(like.storage_offset());
  impl->set_sizes_and_strides(like.sizes(), like.strides());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

at::Tensor to_host(const at::Tensor& tensor) {
  if (!is_desk(tensor)) return tensor;
  return in_storage(tensor, sharing(tensor.storage(), at::kCPU, c10::GetCPUAllocator()), c10::DispatchKey::CPU);
}

at::Tensor to_desk(const at::Tensor& tensor, int index, const std::vector<at::Tensor>& arguments = {}) {
  if (!tensor.defined() || !tensor.device().is_cpu() || tensor.layout() != at::kStrided) return tensor;
  for (auto& argument : arguments) {  // A view is in the storage of its argument.
    bool is_same = tensor.storage().data() && tensor.storage().data() == argument.storage().data();
    if (is_same) return in_storage(tensor, argument.storage(), c10::DispatchKey::PrivateUse1);
  }
  auto storage = sharing(tensor.storage(), c10::Device(DESK, index), &allocator);
  return in_storage(tensor, std::move(storage), c10::DispatchKey::PrivateUse1);
}

// All functions that have no kernel below

const std::set<std::string> WAITING = {
    "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::_local_scalar_dense"};

struct Devices {
  std::set<int> indices;
  bool is_drawn_on_host = false;  // Generators are those of the CPU.
  bool has_host = false;  // A tensor of the CPU with dimensions; one without is a number.
  std::vector<at::Tensor> tensors;

  void add(const at::Tensor& tensor) {
    if (is_desk(tensor)) {
      indices.insert(tensor.device().index());
      tensors.push_back(tensor);
    } else {
      has_host |= tensor.defined() && tensor.device().is_cpu() && tensor.dim() > 0;
    }
  }
  void add(const c10::IValue& value) {
    if (value.isTensor()) add(value.toTensor());
    if (value.isDevice() && value.toDevice().type() == DESK)
      indices.insert(value.toDevice().has_index() ? value.toDevice().index() : current);
    if (value.isGenerator()) is_drawn_on_host |= value.toGenerator().defined();
    if (value.isTensorList()) for (const at::Tensor& tensor : value.toTensorList()) add(tensor);
    else if (value.isList()) for (const c10::IValue& item : value.toListRef()) if (item.isTensor()) add(item.toTensor());
  }
};

c10::IValue host_argument(const c10::IValue& value) {
  if (value.isTensor()) return to_host(value.toTensor());
  if (value.isDevice() && value.toDevice().type() == DESK) return c10::Device(at::kCPU);
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorList()) list.push_back(to_host(tensor));
    return list;
  }
  if (value.isList() && value.toList().elementType()->kind() == c10::TypeKind::OptionalType) {
    c10::List<std::optional<at::Tensor>> list;
    for (const c10::IValue& item : value.toListRef())
      list.push_back(item.isTensor() ? std::optional<at::Tensor>(to_host(item.toTensor())) : std::nullopt);
    return list;
  }
  return value;
}

// The function has written to `written`, and returned `result`, which is the same tensor, or has new memory.
void take_over(const at::Tensor& written, const at::Tensor& result, int index) {
  if (written.sizes() == result.sizes() && written.storage().data() == result.storage().data()) return;
  auto moved = to_desk(result, index);
  auto* impl = written.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(moved.storage());
  impl->set_storage_offset(moved.storage_offset());
  impl->set_sizes_and_strides(moved.sizes(), moved.strides());
}

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack, int index) {
  Inside inside;
  c10::DispatchKeySet host(c10::DispatchKey::CPU);
  auto tags = op.getTags();
  bool draws = std::find(tags.begin(), tags.end(), at::Tag::nondeterministic_seeded) != tags.end();
  if (!draws) return op.redispatchBoxed(host, stack);
  at::Generator generator = at::detail::getDefaultCPUGenerator();
  std::lock_guard<std::mutex> alone(drawing);  // Other threads of the device draw from the same generator.
  auto before = generator.get_state();
  generator.set_state(generator_of(index).get_state());
  try {
    op.redispatchBoxed(host, stack);
  } catch (...) {
    generator.set_state(before);
    throw;
  }
  generator_of(index).set_state(generator.get_state());
  generator.set_state(before);
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.name();
  const auto count = schema.arguments().size();
  count_launch();
  if (WAITING.count(name)) count_sync(name);
  auto last = torch::jit::last(stack, count);
  std::vector<c10::IValue> arguments(last.begin(), last.end());
  Devices devices;
  for (auto& argument : arguments) devices.add(argument);
  TORCH_CHECK(devices.indices.size() <= 1, "Expected all tensors to be on the same device, got several desks in ", name);
  bool takes_host = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index", 0) == 0;
  bool is_mixed = !devices.tensors.empty() && devices.has_host;
  TORCH_CHECK(!is_mixed || takes_host, "Expected all tensors to be on the same device, got desk and cpu in ", name);
  if (is_mixed) count_sync("a blocking copy of indices in " + name);
  TORCH_CHECK(!devices.is_drawn_on_host, "Expected a desk device type for generator, got cpu in ", name);
  const int index = devices.indices.empty() ? current : *devices.indices.begin();

  torch::jit::drop(*stack, count);
  for (auto& argument : arguments) stack->push_back(host_argument(argument));
  run_on_host(op, stack, index);

  std::vector<c10::IValue> results;
  auto returned = torch::jit::last(stack, schema.returns().size());
  for (size_t place = 0; place < returned.size(); place++) {
    const auto& result = returned[place];
    const auto* alias = schema.returns()[place].alias_info();
    if (alias && alias->isWrite()) {
      for (size_t at = 0; at < count; at++) {
        const auto* own = schema.arguments()[at].alias_info();
        if (!own || !own->isWrite() || own->beforeSets() != alias->beforeSets()) continue;
        if (result.isTensor() && is_desk(arguments[at].toTensor())) take_over(arguments[at].toTensor(), result.toTensor(), index);
        results.push_back(arguments[at]);
        break;
      }
    } else if (result.isTensor()) {
      results.push_back(to_desk(result.toTensor(), index, devices.tensors));
    } else if (result.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : result.toTensorList()) list.push_back(to_desk(tensor, index, devices.tensors));
      results.push_back(list);
    } else {
      results.push_back(result);
    }
  }
  torch::jit::drop(*stack, results.size());
  for (auto& result : results) stack->push_back(std::move(result));
}

// Memory, copies and views

c10::ScalarType type_of(std::optional<at::ScalarType> dtype) {
  return dtype.value_or(c10::typeMetaToScalarType(c10::get_default_dtype()));
}

at::Tensor empty(
    c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  OnDevice guard(device && device->has_index() ? device->index() : current);
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, type_of(dtype), format);
}

at::Tensor empty_strided(
    c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device> device, std::optional<bool>) {
  OnDevice guard(device && device->has_index() ? device->index() : current);
  c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys, type_of(dtype));
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  count_launch();
  if (is_desk(from) && to.device().is_cpu()) count_sync("a copy to the host");
  if (is_desk(to) && from.device().is_cpu() && !non_blocking) count_sync("a blocking copy from the host");
  Inside inside;
  at::NoGradGuard no_grad;
  to_host(to).copy_(to_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) {
  count_sync("item");
  Inside inside;
  return to_host(tensor).item();
}

const at::Tensor& resize(const at::Tensor& tensor, c10::SymIntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto wanted = C10_AS_INTARRAYREF_SLOW(size);
  if (tensor.sizes() == wanted) return tensor;
  int64_t elements = 1;
  for (auto length : wanted) elements *= length;
  size_t bytes = (elements + tensor.storage_offset()) * tensor.dtype().itemsize();
  if (tensor.storage().nbytes() < bytes) resize_memory(tensor.storage(), bytes);
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(wanted);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  return tensor;
}

at::Tensor as_strided(
    const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::SymInt> offset) {
  std::optional<int64_t> start;
  if (offset) start = offset->expect_int();
  auto sizes = C10_AS_INTARRAYREF_SLOW(size), strides = C10_AS_INTARRAYREF_SLOW(stride);
  return at::native::as_strided_tensorimpl(tensor, sizes, strides, start);
}

at::Tensor view(const at::Tensor& tensor, c10::SymIntArrayRef size) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& tensor, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_memory(
    at::Tensor& tensor, at::Storage storage, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(offset.expect_int());
  impl->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage storage) {
  int64_t elements = storage.nbytes() / tensor.dtype().itemsize();
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  impl->set_storage_offset(0);
  impl->set_sizes_contiguous({elements});
  return tensor;
}

// Kernels that torch leaves to a backend

at::Tensor convolution(
    const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  count_launch();
  Inside inside;
  auto own = bias && bias->defined() ? std::optional<at::Tensor>(to_host(*bias)) : std::nullopt;
  auto y = at::convolution_symint(
      to_host(x), to_host(weight), own, stride, padding, dilation, transposed, output_padding, groups);
  return to_desk(y, x.device().index());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> mask) {
  count_launch();
  Inside inside;
  std::vector<c10::SymInt> bias{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [dx, dweight, dbias] = at::convolution_backward_symint(
      to_host(dy), to_host(x), to_host(weight), c10::SymIntArrayRef(bias), stride, padding, dilation, transposed,
      output_padding, groups, mask);
  int index = x.device().index();
  return {to_desk(dx, index), to_desk(dweight, index), to_desk(dbias, index)};
}

std::tuple<at::Tensor, at::Tensor> native_dropout(const at::Tensor& x, double p, std::optional<bool> train) {
  count_launch();
  Inside inside;
  int index = x.device().index();
  auto host = to_host(x);
  if (train && !*train) return {to_desk(host.clone(), index), to_desk(at::ones_like(host, at::kBool), index)};
  auto drawn = at::empty({host.numel()}, at::kDouble).uniform_(0, 1, generator_of(index)).reshape(host.sizes());
  auto mask = drawn >= p;
  return {to_desk((host * mask).mul_(1 / (1 - p)), index), to_desk(mask, index)};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", item);
  m.impl("resize_", resize);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", set_memory);
  m.impl("set_.source_Storage", set_storage);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("native_dropout", native_dropout);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(mm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(addmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(cross_entropy_loss, fp32)
  KERNEL_PRIVATEUSEONE(nll_loss, fp32)
}

}  // namespace

// The interface for Python, by ctypes

extern "C" {
int64_t desk_syncs() { return syncs; }
int64_t desk_launches() { return launches; }
void desk_forbid_syncs(int forbids) { forbids_syncs = forbids; }
void desk_set_available(int available) { is_available = available; }
int desk_current() { return current; }
void desk_set_current(int index) { current = index; }
// Other numbers than those of the CPU, and of the other index, with the same seed.
void desk_seed(int index, uint64_t seed) { generator_of(index).set_current_seed(seed + 1000003 * (index + 1)); }
int64_t desk_rng_bytes() { return generator_of(0).get_state().nbytes(); }
void desk_rng_state(int index, void* bytes) {
  auto state = generator_of(index).get_state();
  std::memcpy(bytes, state.data_ptr(), state.nbytes());
}
void desk_set_rng_state(int index, const void* bytes) {
  auto state = generator_of(index).get_state().clone();
  std::memcpy(state.data_ptr(), bytes, state.nbytes());
  generator_of(index).set_state(state);
}
}
