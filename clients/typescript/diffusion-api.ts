/**
 * A client of Diffusion API for browsers, Node 18 and newer, Deno and Bun. One file, no dependency: copy it into your project.
 *
 *     const client = new DiffusionAPIClient("http://127.0.0.1:8000");
 *     const job = await client.txt2img({ prompt: "a large red circle on a blue background" });
 *     const status = await client.result(job.job_id, { onProgress: (now) => console.log(now.progress) });
 *     const picture = await client.getImage(job.job_id);
 *
 * `@openapi NAME` is the schema of the service's /openapi.json that an interface is of; a test compares their fields.
 */

export type State = "queued" | "loading" | "processing" | "done" | "error";

/** @openapi LoraBody */
export interface LoRA {
  name: string;
  scale?: number;
  text_scale?: number | null;
}

/** @openapi HiresBody */
export interface HiresConfig {
  enabled: boolean;
  scale?: number;
  width?: number | null;
  height?: number | null;
  upscaler?: string;
  steps?: number;
  denoising_strength?: number;
  sampler_name?: string | null;
  scheduler_type?: string | null;
  model?: string | null;
  prompt?: string | null;
  negative_prompt?: string | null;
}

/** What every job may say. */
export interface JobRequest {
  fileType?: "jpg" | "png" | "webp" | "avif" | "gif";
  jpeg_quality?: number;
  lossless?: boolean;
  priority?: number;
  deadline?: number;
  webhook?: string;
}

/** What every job may say that draws. */
export interface SamplingRequest extends JobRequest {
  prompt?: string;
  negative_prompt?: string;
  steps?: number;
  cfg_scale?: number;
  width?: number;
  height?: number;
  model?: string;
  sampler_name?: string;
  scheduler_type?: string;
  seed?: number | null;
  n?: number;
  rng?: "nv" | "cpu";
  variation_seed?: number;
  variation_strength?: number;
  seed_resize_width?: number;
  seed_resize_height?: number;
  ensd?: number;
  eta?: number;
  s_churn?: number;
  s_tmin?: number;
  s_tmax?: number;
  s_noise?: number;
  discard_next_to_last_sigma?: boolean;
  guidance_rescale?: number;
  clip_skip?: number;
  emphasis?: "original" | "no norm" | "ignore" | "none";
  styles?: string[];
  infotext?: string;
  loras?: (LoRA | string)[];
  vae?: string;
  refiner_checkpoint?: string | null;
  refiner_switch_at?: number;
  tiling?: boolean;
  sigma_min?: number;
  sigma_max?: number;
  rho?: number;
  /** Steps after which there is a small picture of what is drawn. */
  preview_every?: number;
}

/** @openapi Txt2ImgBody */
export interface Txt2ImgRequest extends SamplingRequest {
  /** May be left out where `image` or `infotext` says it. */
  prompt?: string;
  hires?: HiresConfig;
  /** A picture in base64 or as a data URL, whose infotext says all that is left out here. */
  image?: string;
}

/** @openapi Img2ImgBody */
export interface Img2ImgRequest extends SamplingRequest {
  prompt: string;
  /** A picture in base64 or as a data URL; see `toBase64`. */
  image: string;
  denoising_strength?: number;
  resize_mode?: "just resize" | "crop and resize" | "resize and fill" | "latent";
  resize_to?: { width?: number; height?: number };
  resize_by?: number | { width?: number; height?: number };
  initial_noise_multiplier?: number;
  apply_loras?: boolean;
}

/** @openapi Img2ImgBody */
export interface InpaintRequest extends Img2ImgRequest {
  /** A picture of the same size, white where `image` is painted anew. */
  mask: string;
  mask_blur?: number;
  mask_invert?: boolean;
  mask_fill?: "fill" | "original" | "latent noise" | "latent nothing";
  only_masked?: boolean;
  mask_padding?: number;
}

/** @openapi UpscaleBody */
export interface UpscaleRequest extends JobRequest {
  image: string;
  upscaler?: string;
  scale?: number;
  width?: number;
  height?: number;
}

/** @openapi SubmittedBody */
export interface SubmittedJob {
  job_id: string;
  status: "queued";
  /** The seed that will be used; null for a job that draws nothing. */
  seed: number | null;
  warnings: string[];
}

/** @openapi StatusBody */
export interface JobStatus {
  status: "success";
  job_id: string;
  /** 0 to 100. */
  progress: number;
  current_phase: string;
  state: State;
  error: string | null;
  /** There where there is an error, and the same. */
  detail?: string;
  /** While it waits: how many are before it. */
  position?: number;
  /** Until it ends: in how many seconds that will probably be. */
  eta_seconds?: number | null;
  /** There, and true, once it was cancelled; `state` is "error" then. */
  cancelled?: boolean;
  warnings?: string[];
  /** While it runs, with `preview_every`: a small JPEG in base64. */
  preview?: string;
  webhook?: Record<string, unknown>;
  /** For a job that makes another one again. */
  reproduces?: { job_id: string; matched: boolean | null; differences: string[] } | null;
  loras_applied?: { name: string; scale: number; text_scale: number | null }[];
  loras_skipped?: { name: string; reason: string }[];
  payload?: Record<string, unknown>;
  /** The file in base64; left out unless `image` was asked for. */
  image?: string | null;
  images?: (string | null)[];
  /** Opens the picture without a key for a day; a path, where the service has no public URL. */
  image_url?: string;
  image_urls?: string[];
  /** Of a job that finds words for a picture. */
  caption?: string;
  /** Of a job that turns a picture into numbers: `CLIP_embeddings` and `vae_emb`. */
  embeddings?: Record<string, unknown> | null;
  output_path?: string;
  output_paths?: string[];
  width?: number;
  height?: number;
  file_type?: string;
  jpeg_quality?: number | null;
  generation_time_sec?: number;
  memory_before_mb?: number;
  memory_after_mb?: number;
  seed?: number | null;
  memory_steps?: string[];
  denoising_strength?: number;
  resize_mode?: string;
  resize_to?: { width?: number | null; height?: number | null } | null;
  resize_by?: number | { width?: number; height?: number } | null;
}

/** @openapi JobRow */
export interface JobInfo {
  job_id: string;
  kind: "txt2img" | "img2img" | "upscale" | "caption" | "embed";
  state: State;
  cancelled: boolean;
  progress: number;
  current_phase: string;
  error: string | null;
  position: number | null;
  model: string | null;
  prompt: string | null;
  width: number;
  height: number;
  steps: number | null;
  seed: number | null;
  n: number;
  priority: number;
  created: number;
  started: number | null;
  finished: number | null;
  generation_time_sec: number | null;
  pictures: number;
}

/** @openapi JobsBody */
export interface JobsResponse {
  status: "success";
  jobs: JobInfo[];
  /** The cursor with which the list goes on; null at its end. */
  next: string | null;
}

/** @openapi ModelBody */
export interface ModelInfo {
  name: string;
  label: string;
  type: "standard" | "sdxl";
  path: string;
  family: string;
  pickled: boolean;
}

/** @openapi ModelsBody */
export interface ModelsResponse {
  status: "success";
  models: ModelInfo[];
}

/** @openapi LoraRow */
export interface LoRAInfo {
  name: string;
  scale: number;
  path: string;
  family: string | null;
  trigger_words: string[];
  hash: string | null;
  autov2: string | null;
  pickled: boolean;
}

/** @openapi LorasBody */
export interface LoRAsResponse {
  status: "success";
  loras: LoRAInfo[];
}

/** @openapi CapabilitiesBody */
export interface CapabilitiesResponse {
  status: "success";
  model: Record<string, unknown>;
  features: string[];
  limits: Record<string, number>;
  parameters: Record<string, Record<string, Record<string, unknown>>>;
  sampling_methods: string[];
  scheduler_types: string[];
  file_types: string[];
  upscalers: string[];
  vaes: string[];
  loras: string[];
}

/** @openapi UpscalerRow */
export interface UpscalerInfo {
  name: string;
  path: string;
  type: "internal" | "external";
  description: string;
  size_mb: number;
  pickled?: boolean;
}

/** @openapi UpscalersBody */
export interface UpscalersResponse {
  status: "success";
  upscalers: UpscalerInfo[];
}

/** @openapi SamplingMethodsBody */
export interface SamplingMethodsResponse {
  status: "success";
  sampling_methods: string[];
  scheduler_types: string[];
}

/** @openapi LabelBody */
export interface ModelLabel {
  name: string;
  label: string;
  installed: boolean;
}

/** @openapi LabelsBody */
export interface ModelLabelsResponse {
  status: "success";
  models: ModelLabel[];
  message: string;
}

/** @openapi InfoBody */
export interface ImageInfo {
  status: "success";
  /** The infotext as it was written; empty when there is none. */
  info: string;
  items: Record<string, string>;
  parameters: Record<string, unknown>;
  format: string;
  width: number;
  height: number;
}

/** @openapi HealthBody */
export interface Health {
  status: "healthy" | "warning" | "error";
  /** Epoch seconds. */
  timestamp: number;
  version?: string;
  system?: Record<string, number>;
  gpu?: { device_name: string; [fact: string]: unknown };
  workers?: Record<string, unknown>[];
  models?: { count: number; directory: string };
  loras?: { count: number; directory: string };
  queue?: { active_jobs: number | null; paused: boolean; directory: string };
  outputs?: { available: boolean; free_space_gb: number; directory: string };
  warnings?: string[];
}

/** What happened to a job. */
export type JobEvent =
  | { name: "state" | "progress"; status: JobStatus }
  | { name: "preview"; /** A small JPEG in base64. */ preview: string };

/** The service refused; `message` is its own text: the field, the value and the choices. */
export class ApiError extends Error {
  readonly status: number;
  /** Seconds after which it may take the same request. */
  readonly retryAfter: number | undefined;

  constructor(status: number, message: string, retryAfter?: number) {
    super(`${message} (HTTP ${status})`);
    this.name = "ApiError";
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The job ended without a picture; `job.cancelled` is true if somebody wanted that. */
export class JobFailed extends Error {
  readonly job: JobStatus;

  constructor(job: JobStatus) {
    super(`job ${job.job_id} ended without a picture: ${job.error}`);
    this.name = "JobFailed";
    this.job = job;
  }
}

export interface ClientOptions {
  /** API key, if the service asks for one. */
  key?: string;
  /** Seconds for which a request is sent again while the service is busy and says when; 60. */
  patience?: number;
}

export interface WaitOptions {
  /** Gets every status: the first at once, then one a second at least, then the last. */
  onProgress?: (status: JobStatus) => void;
  /** Ends the waiting, not the job. */
  signal?: AbortSignal;
}

interface Call {
  params?: Record<string, string>;
  query?: [string, string][];
  body?: unknown;
  headers?: Record<string, string>;
  signal?: AbortSignal | undefined;
}

export class DiffusionAPIClient {
  readonly baseUrl: string;
  readonly #key: string | undefined;
  readonly #patience: number;

  constructor(baseUrl = "http://localhost:8000", options: ClientOptions = {}) {
    this.baseUrl = baseUrl.replace(/\/+$/, "");
    this.#key = options.key;
    this.#patience = options.patience ?? 60;
  }

  /** Draws a picture from words. Posting it again under the same `idempotencyKey` makes no second job. */
  txt2img(request: Txt2ImgRequest, idempotencyKey: string = crypto.randomUUID()): Promise<SubmittedJob> {
    return this.#json("POST", "/txt2img", { body: request, headers: { "Idempotency-Key": idempotencyKey } });
  }

  /** Draws a picture from words and a picture. */
  img2img(request: Img2ImgRequest, idempotencyKey: string = crypto.randomUUID()): Promise<SubmittedJob> {
    return this.#json("POST", "/img2img", { body: request, headers: { "Idempotency-Key": idempotencyKey } });
  }

  /** Paints a part of a picture anew. */
  inpaint(request: InpaintRequest, idempotencyKey: string = crypto.randomUUID()): Promise<SubmittedJob> {
    return this.#json("POST", "/inpaint", { body: request, headers: { "Idempotency-Key": idempotencyKey } });
  }

  /** Makes a picture larger. */
  upscale(request: UpscaleRequest, idempotencyKey: string = crypto.randomUUID()): Promise<SubmittedJob> {
    return this.#json("POST", "/upscale", { body: request, headers: { "Idempotency-Key": idempotencyKey } });
  }

  /** Where a job stands, with its pictures in base64. */
  getJobStatus(jobId: string): Promise<JobStatus> {
    return this.#json("GET", "/queue/{job_id}", { params: { job_id: jobId } });
  }

  /** Waits until the job has ended, well or not; its last status, without pictures. */
  async wait(jobId: string, options: WaitOptions = {}): Promise<JobStatus> {
    for (let seconds = 0; ; seconds = options.onProgress ? 1 : 30) {
      const status = await this.#json<JobStatus>("GET", "/queue/{job_id}", {
        params: { job_id: jobId },
        query: [["wait", String(seconds)], ["image", "false"]],
        signal: options.signal,
      });
      options.onProgress?.(status);
      if (status.state === "done" || status.state === "error") return status;
    }
  }

  /** Like `wait`, for a job that must have made a picture. Throws JobFailed. */
  async result(jobId: string, options: WaitOptions = {}): Promise<JobStatus> {
    const status = await this.wait(jobId, options);
    if (status.output_path === undefined) throw new JobFailed(status);
    return status;
  }

  /**
   * What happens to a job, from how it stands now to its end, as it happens. Throws when the connection breaks before that;
   * asked again, it begins with how the job then stands.
   */
  async *events(jobId: string, signal?: AbortSignal): AsyncGenerator<JobEvent, void> {
    const response = await this.#send("GET", "/queue/{job_id}/events", { params: { job_id: jobId }, signal });
    const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
    try {
      for (let text = ""; ; ) {
        const { value, done } = await reader.read();
        if (done) throw new Error(`the events of job ${jobId} broke off before its end`);
        const blocks = (text + value).split("\n\n");
        text = blocks.pop() ?? "";
        for (const event of blocks.map(parsed)) {
          if (event === undefined) continue;
          yield event;
          if (event.name === "state" && (event.status.state === "done" || event.status.state === "error")) return;
        }
      }
    } finally {
      await reader.cancel();
    }
  }

  /** Makes the pictures of a done job again; `reproduces` in the new one's last status says whether they matched. */
  reproduce(jobId: string, idempotencyKey: string = crypto.randomUUID()): Promise<SubmittedJob> {
    const headers = { "Idempotency-Key": idempotencyKey };
    return this.#json("POST", "/queue/{job_id}/reproduce", { params: { job_id: jobId }, headers });
  }

  /** What a picture in base64 says of itself. */
  getImageInfo(image: string): Promise<ImageInfo> {
    return this.#json("POST", "/img-info", { body: { image } });
  }

  /** Lets no job begin; only an admin may. */
  async pause(): Promise<void> {
    await this.#send("POST", "/queue/pause");
  }

  /** Lets jobs begin again; only an admin may. */
  async resume(): Promise<void> {
    await this.#send("POST", "/queue/resume");
  }

  /** Has a model loaded before a job asks for it, by any of its names; its own name. Only an admin may. */
  async loadModel(model: string): Promise<string> {
    return (await this.#json<{ model: string }>("POST", "/models/{name}/load", { params: { name: model } })).model;
  }

  /** How the service is. */
  getHealth(): Promise<Health> {
    return this.#json("GET", "/health");
  }

  /** The labels that may stand for names of models, installed or not. */
  getModelAliases(): Promise<ModelLabelsResponse> {
    return this.#json("GET", "/models/aliases");
  }

  /** The file of a finished picture; `number` is which one of several, from 0. */
  async getImage(jobId: string, number = 0): Promise<Blob> {
    const params = { job_id: jobId, n: String(number) };
    return (await this.#send("GET", "/queue/{job_id}/image/{n}", { params })).blob();
  }

  /** The newest jobs; `cursor` is `next` of the answer before. */
  getJobs(states: (State | "cancelled")[] = [], limit = 50, cursor?: string): Promise<JobsResponse> {
    const query: [string, string][] = [...states.map((state): [string, string] => ["state", state]), ["limit", String(limit)]];
    return this.#json("GET", "/queue", { query: cursor === undefined ? query : [...query, ["cursor", cursor]] });
  }

  /** Ends a job; with `partial`, a running one with the picture that it has so far. */
  cancel(jobId: string, partial = false): Promise<JobStatus> {
    return this.#json("DELETE", "/queue/{job_id}", { params: { job_id: jobId }, query: partial ? [["partial", "true"]] : [] });
  }

  getModels(): Promise<ModelsResponse> {
    return this.#json("GET", "/models");
  }

  getLoRAs(): Promise<LoRAsResponse> {
    return this.#json("GET", "/loras");
  }

  getUpscalers(): Promise<UpscalersResponse> {
    return this.#json("GET", "/upscalers");
  }

  getSamplingMethods(): Promise<SamplingMethodsResponse> {
    return this.#json("GET", "/sampling_methods");
  }

  /** What may be asked of a model, or of the default one: its features, parameters and limits. */
  getCapabilities(model?: string): Promise<CapabilitiesResponse> {
    return this.#json("GET", "/capabilities", { query: model === undefined ? [] : [["model", model]] });
  }

  async #json<T>(method: string, path: string, call: Call = {}): Promise<T> {
    return (await (await this.#send(method, path, call)).json()) as T;
  }

  async #send(method: string, path: string, call: Call = {}): Promise<Response> {
    const filled = path.replace(/\{(\w+)\}/g, (_, name: string) => encodeURIComponent(call.params?.[name] ?? ""));
    const query = new URLSearchParams(call.query ?? []).toString();
    const headers: Record<string, string> = { ...call.headers };
    if (this.#key !== undefined) headers["X-API-Key"] = this.#key;
    if (call.body !== undefined) headers["Content-Type"] = "application/json";
    const until = Date.now() + 1000 * this.#patience;
    for (;;) {
      const response = await fetch(this.baseUrl + filled + (query && `?${query}`), {
        method,
        headers,
        body: call.body === undefined ? null : JSON.stringify(call.body),
        signal: call.signal ?? null,
      });
      if (response.ok) return response;
      const error = await refusal(response);
      if (error.retryAfter === undefined || Date.now() + 1000 * error.retryAfter > until) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(error.retryAfter ?? 0, 0.1)));
    }
  }
}

/** A picture as the service takes it, from a file that a user chose, or from bytes. */
export async function toBase64(picture: Blob | Uint8Array): Promise<string> {
  const bytes = picture instanceof Uint8Array ? picture : new Uint8Array(await picture.arrayBuffer());
  let text = "";
  for (let start = 0; start < bytes.length; start += 0x8000) {
    text += String.fromCharCode(...bytes.subarray(start, start + 0x8000));
  }
  return btoa(text);
}

/** An event from its text; undefined for a comment. */
function parsed(block: string): JobEvent | undefined {
  const lines = block.split("\n").map((line) => line.split(/: ?(.*)/s));
  const field = (name: string) => lines.filter(([key]) => key === name).map(([, value]) => value).join("\n");
  const name = field("event");
  if (name === "state" || name === "progress") return { name, status: JSON.parse(field("data")) as JobStatus };
  if (name === "preview") return { name, preview: (JSON.parse(field("data")) as { preview: string }).preview };
  return undefined;
}

async function refusal(response: Response): Promise<ApiError> {
  const text = await response.text();
  const after = response.headers.get("Retry-After") ?? "";
  const busy = [429, 503, 507].includes(response.status) && /^\d+$/.test(after);
  return new ApiError(response.status, reason(text) || response.statusText, busy ? Number(after) : undefined);
}

function reason(text: string): string {
  try {
    const body = JSON.parse(text) as { error?: string; detail?: string };
    return body.error ?? body.detail ?? text;
  } catch {
    return text.slice(0, 200).trim();
  }
}
